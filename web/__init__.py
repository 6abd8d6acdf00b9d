"""The canvas: `js` is the extension that the browser loads, `host` the server that runs where no ComfyUI does."""
