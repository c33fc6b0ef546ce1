// A figure, and where it is a map of cells: what lies under the pointer, or under the cursor that arrow keys move.
export default {
  render({ model, el }) {
    el.classList.add("ild-live");
    const stage = el.appendChild(document.createElement("div"));
    const tip = el.appendChild(document.createElement("div"));
    tip.className = "tip";
    tip.setAttribute("role", "status");
    let cell = [0, 0];

    function show(row, column) {
      const { box, tips } = model.get("cells");
      const image = stage.querySelector("img");
      cell = [Math.min(Math.max(row, 0), tips.length - 1), Math.min(Math.max(column, 0), tips[0].length - 1)];
      tip.textContent = tips[cell[0]][cell[1]];
      tip.hidden = false;
      const x = box[0] + ((cell[1] + 0.5) / tips[0].length) * (box[2] - box[0]);
      const y = box[1] + ((cell[0] + 0.5) / tips.length) * (box[3] - box[1]);
      tip.style.left = `${Math.min(x * image.clientWidth + 10, el.clientWidth - tip.offsetWidth - 4)}px`;
      tip.style.top = `${y * image.clientHeight + 12}px`;
    }

    function draw() {
      stage.innerHTML = model.get("html");
      tip.hidden = true;
      const image = stage.querySelector("img");
      const { box, tips } = model.get("cells");
      if (!image || !tips) return;
      image.tabIndex = 0;
      image.onpointermove = (event) => {
        const frame = image.getBoundingClientRect();
        const x = ((event.clientX - frame.left) / frame.width - box[0]) / (box[2] - box[0]);
        const y = ((event.clientY - frame.top) / frame.height - box[1]) / (box[3] - box[1]);
        tip.hidden = x < 0 || y < 0 || x >= 1 || y >= 1;
        if (!tip.hidden) show(Math.floor(y * tips.length), Math.floor(x * tips[0].length));
      };
      image.onpointerleave = image.onblur = () => (tip.hidden = true);
      image.onkeydown = (event) => {
        const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!by) return;
        show(cell[0] + by[0], cell[1] + by[1]);
        event.preventDefault();
        event.stopPropagation();
      };
    }
    model.on("change:html", draw);
    model.on("change:cells", draw);
    draw();
  },
};
