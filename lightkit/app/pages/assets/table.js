// Tables that a click on a heading sorts. A cell's data-value is the number that it is sorted by.
"use strict";
(() => {
  const value = (row, column) => {
    const cell = row.cells[column];
    const key = cell.dataset.value;
    return key === undefined ? cell.textContent : key === "" ? null : Number(key);
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        // Missing values stay at the end.
        const rows = [...body.rows].sort((one, other) => {
          const [a, b] = [value(one, column), value(other, column)];
          return down && a !== null && b !== null ? compare(b, a) : compare(a, b);
        });
        body.append(...rows);
      });
    });
  }
})();
