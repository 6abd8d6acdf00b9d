"""The embedded host: executes prompts and serves the canvas where no ComfyUI is installed."""
