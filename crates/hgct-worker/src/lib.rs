//! What every worker does: engine interface, schedule interpreter, gradient exchange, optimizer, conformance suite
