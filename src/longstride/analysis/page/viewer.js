// Sticks coloured by element on a canvas; turned by mouse, finger or arrow keys. Letters beside hetero atoms, so colour is not needed.
const COLOURS = { H: [205, 208, 212], C: [90, 96, 104], N: [0, 92, 200], O: [213, 62, 0], S: [214, 178, 0], P: [204, 102, 0] };
const OTHER = [148, 80, 160];
const LETTERED = (element) => element !== "H" && element !== "C";

function product(a, b) {
  return a.map((row) => [0, 1, 2].map((k) => row[0] * b[0][k] + row[1] * b[1][k] + row[2] * b[2][k]));
}

function turn(across, down) {
  const [c, s, d, t] = [Math.cos(across), Math.sin(across), Math.cos(down), Math.sin(down)];
  return product([[1, 0, 0], [0, d, -t], [0, t, d]], [[c, 0, s], [0, 1, 0], [-s, 0, c]]);
}

function shade(element, depth, dim) {
  const base = COLOURS[element] ?? OTHER;
  const fade = 0.55 * (1 - depth); // far atoms fade into the white ground
  return `rgb(${base.map((part) => Math.round((part * dim) * (1 - fade) + 255 * fade)).join(",")})`;
}

class Viewer {
  constructor(box) {
    this.data = JSON.parse(document.getElementById(box.dataset.of).textContent);
    this.canvas = box.querySelector("canvas");
    this.legend = box.querySelector(".legend");
    this.rotation = turn(0.5, 0.35);
    this.radius = Math.max(...this.data.states.flatMap((one) => one.positions_A.map((x) => Math.hypot(...x)))) + 0.8;
    this.buttons = this.data.states.map((one, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = one.name;
      button.addEventListener("click", () => this.choose(index));
      box.querySelector(".states").append(button);
      return button;
    });
    this.listen();
    this.choose(0);
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  choose(index) {
    this.state = this.data.states[index];
    this.buttons.forEach((button, k) => button.setAttribute("aria-pressed", k === index ? "true" : "false"));
    const { population, torsions_degrees: torsions, trajectory, frame } = this.state;
    const share = population === null ? "" : `population ${(100 * population).toPrecision(3)} %, `;
    const angles = Object.entries(torsions).map(([name, value]) => `${name} ${Math.round(value)}°`).join(", ");
    this.legend.textContent = `${this.state.name}: ${share}${angles}; frame ${frame} of ${trajectory}.`;
    this.draw();
  }

  rotate(across, down) {
    this.rotation = product(turn(across, down), this.rotation);
    this.draw();
  }

  listen() {
    let last = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      last = [event.clientX, event.clientY];
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (last === null) return;
      this.rotate((event.clientX - last[0]) / 120, (event.clientY - last[1]) / 120);
      last = [event.clientX, event.clientY];
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { last = null; });
    const steps = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] };
    this.canvas.addEventListener("keydown", (event) => {
      if (!(event.key in steps)) return;
      event.preventDefault();
      this.rotate(...steps[event.key]);
    });
  }

  project(width, height) {
    const scale = (1.15 * Math.min(width, height)) / (2 * this.radius);
    return this.state.positions_A.map((x) => {
      const [u, v, w] = this.rotation.map((row) => row[0] * x[0] + row[1] * x[1] + row[2] * x[2]);
      const near = 1 + 0.25 * (w / this.radius); // a little perspective
      return { x: width / 2 + u * scale * near, y: height / 2 - v * scale * near, depth: (w / this.radius + 1) / 2, size: scale * near };
    });
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!width || !height) return; // hidden for now
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.lineCap = "round";
    const [atoms, elements] = [this.project(width, height), this.data.elements];
    const parts = [];
    for (const [i, j] of this.data.bonds) {
      const [a, b] = [atoms[i], atoms[j]];
      const middle = { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, depth: (a.depth + b.depth) / 2 };
      for (const [k, end] of [[i, a], [j, b]]) parts.push({ depth: (end.depth + middle.depth) / 2, stick: [end, middle], element: elements[k] });
    }
    atoms.forEach((one, k) => parts.push({ depth: one.depth + 1e-3, ball: one, element: elements[k] }));
    parts.sort((a, b) => a.depth - b.depth);
    for (const part of parts) (part.ball ? this.ball(pen, part) : this.stick(pen, part));
  }

  stick(pen, { stick: [a, b], element, depth }) {
    for (const [thickness, dim] of [[0.26, 0.6], [0.18, 1]]) {
      pen.strokeStyle = shade(element, depth, dim);
      pen.lineWidth = a.size * thickness;
      pen.beginPath();
      pen.moveTo(a.x, a.y);
      pen.lineTo(b.x, b.y);
      pen.stroke();
    }
  }

  ball(pen, { ball, element, depth }) {
    const radius = ball.size * (element === "H" ? 0.16 : 0.24);
    pen.fillStyle = shade(element, depth, 1);
    pen.strokeStyle = shade(element, depth, 0.6);
    pen.lineWidth = 1;
    pen.beginPath();
    pen.arc(ball.x, ball.y, radius, 0, 2 * Math.PI);
    pen.fill();
    pen.stroke();
    if (!LETTERED(element)) return;
    pen.fillStyle = element === "S" ? "#000" : "#fff";
    pen.font = `bold ${Math.max(8, radius * 1.5)}px sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(element, ball.x, ball.y + 0.5);
  }
}

for (const box of document.querySelectorAll(".viewer")) new Viewer(box);
