"""What a training step takes on hardware that is not at hand: components, efficiencies fitted on published runs, and
intervals."""
