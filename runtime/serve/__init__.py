"""Serving: pictures of many requests share their stages, behind a library, HTTP and a page."""
