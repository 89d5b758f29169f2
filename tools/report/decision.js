const live = {{ live | tojson }}, slider = document.getElementById("requests");
const rows = document.querySelectorAll(".chances tbody tr"), mark = document.querySelector(".mark");
slider.parentElement.hidden = false;
slider.oninput = () => {
  const now = live.points[slider.value];
  document.getElementById("n").textContent = now.n;
  slider.setAttribute("aria-valuetext", now.n);
  mark.setAttribute("d", now.mark);
  rows.forEach((row, i) => {
    const [width, chance, cost] = now.methods[i];
    row.querySelector(".bar").style.width = width + "%";
    row.querySelector("span").textContent = chance;
    row.lastElementChild.textContent = cost;
  });
};
