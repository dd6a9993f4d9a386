// Filter, search and sort of the Claims page. Without it the table is complete and in reading order.
(() => {
  const form = document.getElementById("yl-filter"), table = document.getElementById("yl-claims");
  if (!form || !table) return;
  const body = table.tBodies[0], rows = [...body.rows], out = form.querySelector("output");
  const text = new Map(rows.map(r => [r, r.textContent.toLowerCase()]));
  const field = name => form.elements[name];
  const states = () => [...form.querySelectorAll("input[name=state]")];

  function read() { // the address says what is shown, so that a view can be linked
    const q = new URLSearchParams(location.search);
    field("q").value = q.get("q") || "";
    field("area").value = q.get("area") || "";
    field("kind").value = q.get("kind") || "";
    const on = q.getAll("state");
    for (const box of states()) box.checked = on.includes(box.value);
  }

  function write() {
    const q = new URLSearchParams();
    for (const name of ["q", "area", "kind"]) if (field(name).value) q.set(name, field(name).value);
    for (const box of states()) if (box.checked) q.append("state", box.value);
    const url = location.pathname + (q.size ? "?" + q : "") + location.hash;
    try { history.replaceState(null, "", url); } catch { /* not allowed for files in some browsers */ }
  }

  function apply() {
    const words = field("q").value.toLowerCase().split(/\s+/).filter(Boolean);
    const area = field("area").value, kind = field("kind").value;
    const on = new Set(states().filter(b => b.checked).map(b => b.value));
    let n = 0;
    for (const r of rows) {
      const d = r.dataset;
      r.hidden = !((!area || d.area === area) && (!kind || d.kind === kind) && (!on.size || on.has(d.state))
                   && words.every(w => text.get(r).includes(w)));
      n += !r.hidden;
    }
    out.textContent = n === rows.length ? `${n} claims` : `${n} of ${rows.length} claims`;
  }

  function sort(th) {
    const k = th.cellIndex, down = th.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = r => r.cells[k].dataset.sort ?? r.cells[k].textContent;
    const by = (a, b) => key(a).localeCompare(key(b), "en", {numeric: true}) || rows.indexOf(a) - rows.indexOf(b);
    body.append(...[...rows].sort((a, b) => down ? by(b, a) : by(a, b)));
  }

  form.addEventListener("input", () => { apply(); write(); });
  form.addEventListener("submit", e => e.preventDefault());
  for (const button of table.tHead.querySelectorAll("button")) button.addEventListener("click", () => sort(button.closest("th")));
  read();
  apply();
})();
