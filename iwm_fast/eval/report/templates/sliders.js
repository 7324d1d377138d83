"use strict";
for (const card of document.querySelectorAll(".sliders")) {
  const data = JSON.parse(card.querySelector("script").textContent);
  const inputs = [...card.querySelectorAll("input")];
  const show = (slider, at) => {
    const stop = slider.stops[at];
    const put = (figure, picture, caption, asked) => {
      const image = figure.querySelector("img");
      image.src = data.pictures[picture];
      image.alt = caption;
      figure.querySelector("figcaption").textContent = caption;
      figure.classList.toggle("true", asked);
    };
    put(card.querySelector(".asked figure"), stop.view, stop.said, true);
    for (const row of card.querySelectorAll("[data-distance]")) {
      const nearest = stop.nearest[row.dataset.distance];
      row.querySelectorAll("figure").forEach((figure, i) => {
        const asked = nearest[i] === stop.view;
        put(figure, nearest[i], asked ? (i + 1) + " · asked" : String(i + 1), asked);
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
