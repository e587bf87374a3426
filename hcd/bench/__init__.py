"""Load generators on hcd's own vhost-user front end: ``hcd bench`` loads any back end and says what it cost."""
