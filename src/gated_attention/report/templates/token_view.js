for (const view of document.querySelectorAll(".gates")) {
  const data = JSON.parse(view.querySelector("script").textContent);
  const tokens = view.querySelectorAll(".text span"), slider = view.querySelector("input");
  const shown = view.querySelector("output");
  view.querySelector("label").hidden = false;
  const draw = () => {
    const row = data.rows[slider.value];
    shown.textContent = data.names[slider.value];
    tokens.forEach((token, i) => {
      token.style.setProperty("--g", Math.min(1, Math.max(0, (row[i] - data.low) / (data.high - data.low))));
      token.title = row[i].toFixed(3);
    });
  };
  slider.addEventListener("input", draw);
  draw();
}
