"""Checkpoints: training state and Hugging Face folders. It depends on no model: models pass trees and tables."""
