//! The run's text, tokenized beside what comes before training.

use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Result, anyhow};

use crate::job::{LoadedJob, PreparedData};
use crate::workspace::Workspace;

/// The tokens, and the seconds that they took.
type Made = Result<(PreparedData, f64)>;

pub(super) enum Text {
    Coming(JoinHandle<Made>),
    Here(Box<(PreparedData, f64)>),
}

impl Text {
    /// Begins to tokenize.
    pub(super) fn prepare(loaded: LoadedJob, workspace: Workspace) -> Self {
        Self::Coming(std::thread::spawn(move || {
            let begun = Instant::now();
            loaded.prepare_data(&workspace).map(|data| (data, begun.elapsed().as_secs_f64()))
        }))
    }

    /// Ends the run between two stages where the text is known to be bad, rather than after all of
    /// them; never waits.
    pub(super) fn look(self) -> Result<Self> {
        match self {
            Self::Coming(thread) if thread.is_finished() => Ok(Self::Here(Box::new(made(thread)?))),
            text => Ok(text),
        }
    }

    /// Waits for the tokens.
    pub(super) fn wait(self) -> Made {
        match self {
            Self::Coming(thread) => made(thread),
            Self::Here(made) => Ok(*made),
        }
    }
}

fn made(thread: JoinHandle<Made>) -> Made {
    thread.join().map_err(|_| anyhow!("the thread that prepares data panicked"))?
}
