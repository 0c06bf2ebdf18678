"""What the operator does to a platform: each use case plans or checks first, then acts."""
