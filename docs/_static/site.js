// Opened from disk, a page may not read other pages: the search lists its results without excerpts.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// A picture opens in full on a click.
document.addEventListener("DOMContentLoaded", () => {
  for (const img of document.querySelectorAll(".yl-figure img, .cell_output img")) {
    img.addEventListener("click", () => img.classList.toggle("yl-large"));
  }
});
