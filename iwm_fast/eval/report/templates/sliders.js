"use strict";
for (const card of document.querySelectorAll(".sliders")) {
  const data = JSON.parse(card.querySelector("script").textContent);
  const source = card.querySelector(".source figure");
  const clean = source.querySelector("img").src;
  const inputs = [...card.querySelectorAll("input")];
  const show = (slider, at) => {
    const stop = slider.stops[at];
    const corrupted = stop.source !== undefined;
    const put = (figure, address, caption, asked) => {
      const image = figure.querySelector("img");
      image.src = address;
      image.alt = caption;
      figure.querySelector("figcaption").textContent = caption;
      figure.classList.toggle("true", asked);
    };
    put(source, corrupted ? data.pictures[stop.source] : clean, corrupted ? stop.said : "clean", false);
    put(card.querySelector(".asked figure"), data.pictures[stop.view], corrupted ? "clean" : stop.said, true);
    for (const row of card.querySelectorAll("[data-distance]")) {
      const nearest = stop.nearest[row.dataset.distance];
      row.querySelectorAll("figure").forEach((figure, i) => {
        const asked = nearest[i] === stop.view;
        put(figure, data.pictures[nearest[i]], asked ? (i + 1) + " · correct" : String(i + 1), asked);
      });
      row.querySelector(".place").textContent = stop.place[row.dataset.distance];
    }
  };
  inputs.forEach((input, i) => {
    const slider = data.sliders[i];
    const say = (other, at) => {
      const words = data.sliders[other].stops[at].said;
      inputs[other].setAttribute("aria-valuetext", words);
      inputs[other].parentElement.querySelector("output").textContent = words;
    };
    input.disabled = false;
    input.addEventListener("input", () => {
      inputs.forEach((other, j) => {
        if (j !== i) {
          other.value = data.sliders[j].neutral;
          say(j, data.sliders[j].neutral);
        }
      });
      const at = Number(input.value);
      say(i, at);
      show(slider, at);
    });
  });
}
