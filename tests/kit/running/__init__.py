"""Parts of ctrace while they run, and how a test asks them: recorder, capture, screen, scrape."""
