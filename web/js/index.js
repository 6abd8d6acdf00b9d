// The canvas extension: colours that tell roles, what a node last said kept on it, errors in their own words, a menu entry
// that opens the starter, and a badge in About. It saves nothing but colours and reorders nothing, so workflows read the same without it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// The folder's name inside custom_nodes: whoever cloned the pack chose it. It names the pack's templates too.
const PACK = new URL(import.meta.url).pathname.split("/").slice(-2)[0];
const STARTER = "text-to-image";
const PREFIX = "FluxCanvas_";
const NOTE = "$$fluxcanvas-note";
const LIVE_TEXT = "$$node-text-preview"; // the canvas's own line; it stays when a run ends before its request is answered
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const NOTE_STYLE = "font-size:11px; line-height:1.35; opacity:0.75; white-space:pre-wrap; overflow-wrap:anywhere;";
const NOTE_WIDTH = 270; // of a node with a note, at least
const NOTE_HEIGHT = 400; // at most; a longer one scrolls
const NOTE_MARGIN = 24; // the canvas leaves 10 above an element and 10 below
const BOX_HEIGHT = 80; // of a text box above a note, at least: the canvas leaves it a line and a half
const NODE_COLOURS = {
  "FluxCanvas/loaders": ["#2f3b52", "#232c3d"],
  "FluxCanvas/model": ["#3a3358", "#2b2642"],
  "FluxCanvas/conditioning": ["#2f4a3c", "#23382d"],
  "FluxCanvas/latent": ["#4a3a2f", "#382c23"],
  "FluxCanvas/sampling": ["#4a2f47", "#382335"],
};
const LINK_COLOURS = {
  FLUX_MODEL: "#a99be0",
  FLUX_TEXT: "#ead15c",
  FLUX_VAE: "#ef7f7a",
  FLUX_CONDITIONING: "#f2ab58",
  FLUX_LORA: "#6fc3d8",
  FLUX_CONTROLNET: "#7fd6a2",
  FLUX_ADAPTER: "#d993c8",
};

const said = new Map(); // node id -> its last line in the present run; the canvas itself forgets it when the run ends

function isOurs(node) {
  return Boolean(node?.comfyClass?.startsWith(PREFIX));
}

// A read-only text below a node's widgets. It is never saved, and it is always the last.
function noteOf(node) {
  const present = node.widgets?.find((widget) => widget.name === NOTE);
  if (present) return present;
  const element = document.createElement("div");
  element.style.cssText = `${NOTE_STYLE} overflow:auto;`;
  const height = () => note.needs; // what room a node has beyond that belongs to its boxes
  const options = { serialize: false, getMinHeight: height, getMaxHeight: height };
  const note = node.addDOMWidget(NOTE, "note", element, options);
  note.serialize = false;
  const boxes = node.widgets.filter((widget) => widget.element?.tagName === "TEXTAREA");
  for (const box of boxes) box.options.getMinHeight = () => BOX_HEIGHT;
  return note;
}

// How high a text is when it is wrapped to a width. The widget cannot tell: it may not be on the page yet.
function heightOf(text, width) {
  const probe = document.createElement("div");
  probe.style.cssText = `${NOTE_STYLE} position:fixed; visibility:hidden; width:${width}px;`;
  probe.textContent = text;
  document.body.append(probe);
  const height = probe.offsetHeight;
  probe.remove();
  return height;
}

function showNote(node, text) {
  const live = node.widgets?.find((widget) => widget.name === LIVE_TEXT);
  if (live) node.removeWidget(live);
  const width = Math.max(node.size[0], NOTE_WIDTH);
  const note = noteOf(node);
  note.element.textContent = text;
  note.needs = Math.min(heightOf(text, width - 30), NOTE_HEIGHT) + NOTE_MARGIN;
  node.setSize([width, Math.max(node.size[1], node.computeSize()[1])]);
}

// A node in a subgraph is named by the way to it: "12:5".
function nodeAt(path) {
  let graph = app.rootGraph ?? app.graph;
  let node;
  for (const id of path.split(":")) {
    node = graph?.getNodeById(id);
    graph = node?.subgraph;
  }
  return node;
}

function keepNotes() {
  for (const [path, text] of said) {
    const node = nodeAt(path);
    if (isOurs(node)) showNote(node, text);
  }
  said.clear();
}

// The canvas's own toast says that a node failed or refused an input; these say why and what to do, until the next run.
let toasts = [];

function tell(type, detail) {
  const summary = LiteGraph.registered_node_types[type]?.title ?? type;
  const { toast } = app.extensionManager;
  if (toast.error) toasts.push(toast.error(summary, { description: detail, duration: 30000 }));
  else toast.add({ severity: "error", summary, detail, life: 30000 }); // ComfyUI with an older canvas
}

function tellError({ node_id: id, node_type: type, exception_type: error, exception_message: message }) {
  if (!type.startsWith(PREFIX) && !error.endsWith(".FluxError")) return;
  said.delete(String(id)); // what it was about to do
  tell(type, message);
}

function offersNothing(type, input) {
  const [choices, options] = LiteGraph.registered_node_types[type]?.nodeData?.input?.required?.[input] ?? [];
  return (Array.isArray(choices) ? choices : options?.options)?.length === 0;
}

// What the canvas leaves out: the words of a node that refuses an input, once each (ComfyUI repeats them for every input,
// as "input - words"), and that a list is empty, which it takes for a missing connection.
function refusals(type, errors) {
  const refused = errors.filter((error) => error.type === "custom_validation_failed");
  const words = new Set(refused.map(({ details }) => details.split(" - ").slice(1).join(" - ")));
  const missing = errors.filter((error) => error.type === "required_input_missing");
  const empty = missing.map((error) => error.extra_info.input_name).filter((input) => offersNothing(type, input));
  if (empty.length) words.add(`No file to choose for ${empty.join(", ")}: the node's help names the folder. Then press R.`);
  return [...words].filter(Boolean);
}

function tellRefusals(nodes) {
  for (const { class_type: type, errors } of Object.values(nodes ?? {})) {
    if (type.startsWith(PREFIX)) for (const detail of refusals(type, errors)) tell(type, detail);
  }
}

// Refusals come as the answer to the request alone, so the request is where they can be seen.
function watchRequests() {
  const queuePrompt = api.queuePrompt;
  api.queuePrompt = async function (...request) {
    for (const toast of toasts) app.extensionManager.toast.dismiss(toast);
    toasts = [];
    try {
      const answer = await queuePrompt.apply(this, request);
      tellRefusals(answer.node_errors);
      return answer;
    } catch (error) {
      tellRefusals(error.response?.node_errors);
      throw error;
    }
  };
}

async function openStarter() {
  const response = await api.fetchApi(`/workflow_templates/${PACK}/${STARTER}.json`);
  if (!response.ok) {
    const detail = `The server has no template ${STARTER} (${response.status}).`;
    app.extensionManager.toast.add({ severity: "error", summary: "FluxCanvas", detail, life: 8000 });
    return;
  }
  await app.loadGraphData(await response.json(), true, true, STARTER);
}

app.registerExtension({
  name: "FluxCanvas",
  commands: [
    { id: "FluxCanvas.OpenStarter", label: "Open the starter", icon: "pi pi-image", function: openStarter },
  ],
  menuCommands: [{ path: ["FluxCanvas"], commands: ["FluxCanvas.OpenStarter"] }],
  aboutPageBadges: [
    { label: "FluxCanvas", url: "https://huggingface.co/docs/diffusers/api/pipelines/flux", icon: "pi pi-image" },
  ],
  setup() {
    api.addEventListener("progress_text", ({ detail }) => said.set(String(detail.nodeId), detail.text));
    api.addEventListener("execution_error", ({ detail }) => tellError(detail));
    for (const end of ENDS) api.addEventListener(end, keepNotes);
    watchRequests();
  },
  nodeCreated(node) {
    if (!isOurs(node)) return;
    const colours = NODE_COLOURS[node.constructor.category];
    if (colours) [node.color, node.bgcolor] = colours; // a colour saved in a workflow is set after this
    // Here and not in setup: a palette, loaded after setup or chosen later, forgets the types it does not know.
    Object.assign(app.canvas.default_connection_color_byType, LINK_COLOURS);
    Object.assign(app.canvas.constructor.link_type_colors, LINK_COLOURS);
  },
});
