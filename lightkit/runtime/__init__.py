"""The processes of a job: how they start, meet, watch each other and end. Knows neither Hydra nor models."""
