"""The contract between the offline job, which writes a plan, and the engine, which obeys it.

Records are below (`keep`, `view`, `costs`, `schema`), what reads and writes them above (`store`, `parcel`).
"""
