"""Checkpoints: training state and Hugging Face folders. Knows no model: models hand it trees and tables."""
