"""What chats look like outside of the database: one file for each format, and what they share."""
