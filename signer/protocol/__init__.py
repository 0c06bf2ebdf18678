"""Messages between api and keeper: commands, sign requests, and the api's client of the keeper's socket."""
