"""Image-text-to-text models of transformers: LLaVA, Qwen2.5-VL, SmolVLM, PaliGemma and
relatives.
"""
