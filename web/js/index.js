// The canvas extension: colours that tell roles, what a node last said kept on it, errors in their own words, a menu entry
// that opens the starter, and a badge in About. It adds nothing that is saved and reorders nothing, so workflows read the same without it.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// The folder's name inside custom_nodes: whoever cloned the pack chose it. It names the pack's templates too.
const PACK = new URL(import.meta.url).pathname.split("/").slice(-2)[0];
const STARTER = "text-to-image";
const PREFIX = "FluxCanvas_";
const NOTE = "$$fluxcanvas-note";
const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const NODE_COLOURS = {
  "FluxCanvas/loaders": ["#2f3b52", "#232c3d"],
  "FluxCanvas/conditioning": ["#2f4a3c", "#23382d"],
  "FluxCanvas/latent": ["#4a3a2f", "#382c23"],
  "FluxCanvas/sampling": ["#4a2f47", "#382335"],
};
const LINK_COLOURS = {
  FLUX_MODEL: "#a99be0",
  FLUX_TEXT: "#ead15c",
  FLUX_VAE: "#ef7f7a",
  FLUX_CONDITIONING: "#f2ab58",
};

const said = new Map(); // node id -> its last line in the present run; the canvas itself forgets it when the run ends

function isOurs(node) {
  return Boolean(node?.comfyClass?.startsWith(PREFIX));
}

// A read-only text below a node's widgets. It is never saved, and it is always the last.
function noteOf(node) {
  const present = node.widgets?.find((widget) => widget.name === NOTE);
  if (present) return present.element;
  const element = document.createElement("div");
  element.style.cssText = "font-size:11px; line-height:1.35; opacity:0.75; overflow:auto; white-space:pre-wrap;";
  const getMinHeight = () => 18 * element.textContent.split("\n").length + 8;
  node.addDOMWidget(NOTE, "note", element, { serialize: false, getMinHeight }).serialize = false;
  return element;
}

function keepNotes() {
  for (const [id, text] of said) {
    const node = app.graph.getNodeById(id);
    if (!isOurs(node)) continue;
    noteOf(node).textContent = text;
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
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

// What our nodes refuse, once each: ComfyUI repeats a refusal for every input that was judged, as "input - refusal".
function tellRefusals(nodes) {
  for (const { class_type: type, errors } of Object.values(nodes ?? {})) {
    const refusals = errors.filter((error) => error.type === "custom_validation_failed");
    const words = new Set(refusals.map(({ details }) => details.split(" - ").slice(1).join(" - ")));
    for (const detail of words) if (detail && type.startsWith(PREFIX)) tell(type, detail);
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
