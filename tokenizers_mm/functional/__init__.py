"""The mathematics: stateless functions; every formula has one home here."""
