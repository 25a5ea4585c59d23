"""From a trained run to audio: greedy generation and vocoders; no training of the stages, no scoring."""
