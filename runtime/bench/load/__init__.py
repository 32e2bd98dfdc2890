"""What a service gives under load: arrivals, ways to serve them, how many are in time; and a simulation of many."""
