"use strict";
// Draws the slices of each case on canvases: one of image and truth, one per run with its prediction and, where
// uncertainty is above the threshold, its uncertainty. Without this script the page shows still pictures instead.
(() => {
  const page = JSON.parse(document.getElementById("cases").textContent);
  const colour = (i) => [0, 2, 4].map((at) => parseInt(page.map.substr(6 * i + at, 2), 16));
  const colours = Array.from({ length: 256 }, (_, i) => colour(i));

  const sheet = (width, height) => {
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = height;
    return canvas;
  };

  // The grey values of all slices, one array for each.
  const read = async (uri, data) => {
    const picture = new Image();
    picture.src = uri;
    await picture.decode();
    const context = sheet(picture.width, picture.height).getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    return Array.from({ length: data.slices }, (_, i) => {
      const x = (i % data.columns) * data.width, y = Math.floor(i / data.columns) * data.height;
      const pixels = context.getImageData(x, y, data.width, data.height).data;
      return Uint8Array.from({ length: data.width * data.height }, (_, p) => pixels[4 * p]);
    });
  };

  // Draw one value per pixel: paint(p) gives red, green, blue and opacity.
  const layer = (data, paint) => {
    const canvas = sheet(data.width, data.height), context = canvas.getContext("2d");
    const image = context.createImageData(data.width, data.height);
    for (let p = 0; p < data.width * data.height; p++) image.data.set(paint(p), 4 * p);
    context.putImageData(image, 0, 0);
    return canvas;
  };

  // Lines between pixels of unlike label: of each class in its colour, or all in one.
  const outline = (context, data, labels, ink, width) => {
    const { width: w, height: h } = data, sx = context.canvas.width / w, sy = context.canvas.height / h;
    for (let k = 1; k <= page.classes.length; k++) {
      context.beginPath();
      const is = (x, y) => x >= 0 && y >= 0 && x < w && y < h && labels[y * w + x] === k;
      for (let y = 0; y <= h; y++) {
        for (let x = 0; x <= w; x++) {
          const here = is(x, y);
          if (here !== is(x - 1, y)) { context.moveTo(x * sx, y * sy); context.lineTo(x * sx, (y + 1) * sy); }
          if (here !== is(x, y - 1)) { context.moveTo(x * sx, y * sy); context.lineTo((x + 1) * sx, y * sy); }
        }
      }
      context.strokeStyle = ink || page.classes[k - 1].colour;
      context.lineWidth = width;
      context.stroke();
    }
  };

  const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(part && part < whole / 10 ? 1 : 0) + " %" : "–");

  const start = async (box, data) => {
    const [image, truth, ...rest] = await Promise.all(
      [data.image, data.truth, ...data.runs.flatMap((run) => [run.prediction, run.uncertainty])].map((uri) => read(uri, data)),
    );
    const slice = box.querySelector(".slice"), threshold = box.querySelector(".threshold");
    const panels = [...box.querySelectorAll("canvas")], notes = [...box.querySelectorAll("figcaption")];
    const draw = () => {
      const z = Number(slice.value), t = Number(threshold.value);
      box.querySelector(".slice-value").textContent = `${z + 1} of ${data.slices}`;
      box.querySelector(".threshold-value").textContent = t.toFixed(2);
      const grey = layer(data, (p) => [image[z][p], image[z][p], image[z][p], 255]);
      panels.forEach((canvas, i) => {
        const context = canvas.getContext("2d");
        context.imageSmoothingEnabled = true;
        context.drawImage(grey, 0, 0, canvas.width, canvas.height);
        if (i === 0) {
          outline(context, data, truth[z], null, 2.5);
          return;
        }
        const labels = rest[2 * i - 2][z], uncertainty = rest[2 * i - 1][z];
        let flagged = 0, wrong = 0, found = 0;
        const heat = layer(data, (p) => {
          const over = uncertainty[p] / 255 > t, error = labels[p] !== truth[z][p];
          flagged += over;
          wrong += error;
          found += over && error;
          return over ? [...colours[Math.min(255, Math.round(uncertainty[p] / page.top))], 190] : [0, 0, 0, 0];
        });
        context.imageSmoothingEnabled = false;
        context.drawImage(heat, 0, 0, canvas.width, canvas.height);
        outline(context, data, truth[z], "#fff", 1.2);
        outline(context, data, labels, null, 2.5);
        notes[i].querySelector(".counts").textContent =
          `above the threshold: ${percent(flagged, labels.length)} of the slice, ${percent(found, wrong)} of its ${wrong} wrong voxels`;
      });
    };
    slice.addEventListener("input", draw);
    threshold.addEventListener("input", draw);
    draw();
    box.hidden = false;
    box.parentElement.classList.add("live");
    box.dataset.ready = "yes";
  };

  // One after another, each when it comes near the window: decoding all at once would hold the page up.
  const watch = new IntersectionObserver((seen) => {
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      watch.unobserve(target);
      const box = target.querySelector(".viewer");
      start(box, page.cases[Number(box.dataset.case)]).catch((error) => console.error(error));
    }
  }, { rootMargin: "800px" });
  document.querySelectorAll(".viewer").forEach((box) => watch.observe(box.parentElement));
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
