for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key ?? "";
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const [p, q] = [Number(x), Number(y)];
        const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
        return down ? -order : order;
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
    });
  });
}

const pick = document.getElementById("pick");
if (pick) {
  const sections = [...document.querySelectorAll("section.system")];
  const show = (anchor) => {
    for (const one of sections) one.hidden = anchor !== "" && one.id !== `section-${anchor}`;
    pick.value = anchor;
  };
  pick.addEventListener("change", () => {
    show(pick.value);
    location.hash = pick.value || "summary";
  });
  const follow = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const home = target?.closest("section.system");
    if (home?.hidden) show(home.id.replace("section-", ""));
    if (home) target.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  if (sections.length > 3) show(sections[0].id.replace("section-", ""));
  follow();
}
