// Shows a mark's recipe below the plot when it is pointed at, tapped or focused. Without it, titles do the same.
for (const figure of document.querySelectorAll("figure")) {
  const tip = figure.querySelector(".tip");
  if (!tip) continue;
  const show = (event) => {
    const mark = event.target.closest("[data-tip]");
    if (mark) tip.textContent = mark.dataset.tip;
  };
  for (const kind of ["pointerover", "click", "focusin"]) figure.addEventListener(kind, show);
}

// Paper shows what is folded away on the screen.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
