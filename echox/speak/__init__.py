"""From a trained run to answers, whole or while they come, and to audio; no training of the stages, no scoring."""
