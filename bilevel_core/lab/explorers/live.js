// The page's side of a live figure: a button that loads runtime and weights, a worker, and one way to ask it.
// figure: what the engine hands over, data.live of it as worker.py writes it; ready(ask) is called once all is loaded.
function connect(figure, ready) {
  const { el, memo, request, reset, data: { live } } = figure;
  const state = (memo.live = { phase: "idle", said: "" });
  const button = el("button", { type: "button", class: "blx-load" }, `Load the model (${live.megabytes} MB)`);
  const say = (phase, said = "") => {
    Object.assign(state, { phase, said });
    request();
  };
  const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  if (typeof WebAssembly !== "object" || typeof Worker !== "function" || !WebAssembly.validate(Uint8Array.from(SIMD))) {
    say("failed", "This browser has no WebAssembly with SIMD, which the model needs: the recorded figure stays.");
    return;
  }
  // files come by script elements: pages opened from a disk may not fetch
  const files = (window.blxFiles = window.blxFiles || {});
  const script = (name) => new Promise((done, fail) => {
    const key = `${name} ${live.files[name]}`;
    if (files[key]) return done(files[key]);
    const node = el("script", { src: `${live.folder}${name}.js?${live.files[name]}` });
    node.onload = () => (files[key] ? done(files[key]) : fail(new Error(`${name}.js is damaged, or of another build: build the book again`)));
    node.onerror = () => fail(new Error(`${name}.js is missing from ${live.folder}: build the book again`));
    document.head.append(node);
  });
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  let worker = null, count = 0;
  const open = new Map();
  const end = (error) => {
    for (const { fail } of open.values()) fail(error);
    open.clear();
  };
  const ask = (question) => new Promise((done, fail) => {
    open.set(count, { done, fail });
    worker.postMessage({ id: count, ...question });
    count += 1;
  });
  button.addEventListener("click", async () => {
    button.disabled = true;
    say("loading", `Loading ${live.megabytes} MB and starting the networks.`);
    try {
      const runtime = await script("runtime"), pack = await script(live.pack);
      worker = new Worker(URL.createObjectURL(new Blob([runtime.script], { type: "text/javascript" })));
      worker.onerror = (event) => end(new Error(event.message || "the worker stopped"));
      worker.onmessage = ({ data }) => {
        const { done, fail } = open.get(data.id);
        open.delete(data.id);
        if (data.error) fail(new Error(data.error));
        else done(data);
      };
      await ask({ ask: "load", wasm: bytes(runtime.wasm), pack: bytes(pack.safetensors), checksum: live.checksum });
      button.remove();
      say("ready");
      figure.root.explorer.ask = ask;
      await ready(ask);
    } catch (error) {
      if (worker) worker.terminate();
      for (const key of Object.keys(files)) delete files[key]; // the next try asks for them anew
      button.disabled = false;
      button.textContent = "Try again";
      say("failed", `It did not work: ${error.message}.`);
    }
  });
  reset.before(button);
}
