// The search dialog gives the field to type in at once; figures open in full on a click.
document.addEventListener("DOMContentLoaded", () => {
  for (const img of document.querySelectorAll(".yl-figure img, .cell_output img")) {
    img.addEventListener("click", () => img.classList.toggle("yl-large"));
  }
});
