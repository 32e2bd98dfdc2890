"""The page at `/`: its files, and the jobs, choices and settings that it asks for."""
