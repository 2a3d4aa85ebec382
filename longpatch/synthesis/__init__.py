"""Questions about long texts, made to teach a model to look far back."""
