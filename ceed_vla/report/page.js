"use strict";
(() => {
  const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const faint = getComputedStyle(document.documentElement).getPropertyValue("--faint").trim();
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;

  // Figures.
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const narrow = window.innerWidth < 600;
  plots.forEach((plot, index) => {
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: narrow ? 11 : 13 },
      margin: { l: narrow ? 44 : 60, r: 16, t: 16, b: 48 }, legend: { orientation: "h", y: -0.25 }, showlegend: false,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: ink },
      ...plot.layout,
    };
    for (const name of ["xaxis", "yaxis"]) {
      layout[name] = { gridcolor: faint, zerolinecolor: faint, linecolor: faint, ...layout[name] };
    }
    Plotly.newPlot(`plot-${index}`, plot.traces, layout, { responsive: true, displaylogo: false,
      displayModeBar: narrow ? false : "hover", transition: still ? { duration: 0 } : undefined });
  });

  // Tables: a header sorts by its column, first descending for numbers.
  const value = (row, column) => {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  };
  for (const table of document.querySelectorAll("table")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => header.querySelector("button").addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const numbers = rows.some((row) => typeof value(row, column) === "number");
      const before = header.getAttribute("aria-sort");
      const ascending = before === "none" ? !numbers : before === "descending";
      rows.sort((a, b) => {
        const one = value(a, column), other = value(b, column);
        if (one === null || other === null) return compare(one, other); // missing ones stay last
        return (ascending ? 1 : -1) * compare(one, other);
      });
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    }));
  }
})();
