// The legend over the figures: a click hides, or shows, whatever has its tag, in every figure.
(() => {
  const hidden = new Set();
  const figures = () => Bokeh.documents.flatMap((document) => document.roots());
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      if (shown) hidden.add(button.value);
      else hidden.delete(button.value);
      for (const figure of figures())
        for (const part of [...figure.renderers, ...figure.center])
          if (part.tags.length) part.visible = !part.tags.some((tag) => hidden.has(tag));
    });
  }
  // Under a finger the page is to scroll, not the figure to zoom; its tools are still a touch away.
  const release = () => {
    const drawn = figures();
    if (!drawn.length) return void setTimeout(release, 50);
    for (const figure of drawn)
      for (const tool of figure.toolbar.tools) if (tool.name === "drag") tool.active = false;
  };
  if (document.querySelector(".figures") && matchMedia("(pointer: coarse)").matches) release();
})();
