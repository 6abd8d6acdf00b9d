"""LoRAs: read from the formats people have, stacked with weights, and applied from outside."""
