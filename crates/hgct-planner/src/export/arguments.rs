//! Command-line arguments, one a line: Megatron-LM's, which SynerFuse's fork of it has too.

use std::fmt::Write as _;

use super::Exported;

/// Arguments after comment lines.
pub(super) struct Arguments {
    text: String,
}

impl Arguments {
    pub(super) fn after(comments: String) -> Self {
        Self { text: comments }
    }

    /// Adds `--name value`, or a flag where the value is empty.
    pub(super) fn add(&mut self, name: &str, value: &str) {
        let _ = writeln!(self.text, "--{name}{}{value}", if value.is_empty() { "" } else { " " });
    }

    /// Adds what a plan says of embeddings, optimizer state and recompute; the text of them all.
    pub(super) fn finish(mut self, plan: &Exported, recompute: bool) -> String {
        if plan.tied_embeddings == Some(false) {
            self.add("untie-embeddings-and-output-weights", "");
        }
        if plan.shard_optimizer {
            self.add("use-distributed-optimizer", "");
        }
        if recompute {
            self.add("recompute-granularity", "full");
            self.add("recompute-method", "uniform");
            self.add("recompute-num-layers", "1");
        }
        self.text
    }
}
