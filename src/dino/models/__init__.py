"""Networks: vision transformers, convnets, the projection head."""
