//! A run that goes on: its newest checkpoint that verifies, and who gets which part of it.

use anyhow::{Result, bail};
use hgct_checkpoint::{Checkpoint, Checkpoints};
use hgct_control::coordinator::Command;
use hgct_core::ids::RunId;
use hgct_core::plan::Plan;
use hgct_core::slice::{Role, Slice};

use super::file_of;
use crate::ckpt::newest_verified;
use crate::job::LoadedJob;
use crate::session::Session;
use crate::workspace::Workspace;

/// A run to continue.
pub(super) struct Resume {
    pub(super) run: RunId,
    pub(super) checkpoint: Checkpoint,
}

/// A run that cannot be used as asked.
#[derive(Debug, thiserror::Error)]
#[error("run {run} {reason}")]
pub(super) struct BadRun {
    pub(super) run: RunId,
    pub(super) reason: String,
}

impl Resume {
    /// The newest checkpoint of a run that verifies; says which newer ones do not.
    pub(super) fn find(workspace: &Workspace, name: &str, loaded: &LoadedJob) -> Result<Self> {
        let folder = workspace.find_run(name)?;
        let run = RunId::new(file_of(&folder))?;
        let checkpoints = Checkpoints::open(folder.join("checkpoints"));
        let Some(checkpoint) = newest_verified(&checkpoints)? else {
            bail!(BadRun { run, reason: "has no checkpoint that verifies".into() });
        };
        if checkpoint.manifest().model != loaded.model {
            bail!(BadRun {
                run,
                reason: format!("trained another model than that of {}", loaded.path.display())
            });
        }
        if checkpoint.manifest().job != loaded.job.hash() {
            eprintln!("hgct: {} has changed since the checkpoint was written", loaded.path.display());
        }
        eprintln!("resuming {run} after step {}", checkpoint.manifest().step);
        Ok(Self { run, checkpoint })
    }

    pub(super) fn step(&self) -> u64 {
        self.checkpoint.manifest().step
    }

    /// Sends every owner its state, whoever had it before.
    pub(super) fn send(&self, session: &mut Session, plan: &Plan) -> Result<()> {
        for group in &plan.owners {
            let wanted: Vec<(Slice, Role)> = group
                .slices
                .iter()
                .flat_map(|slice| [Role::Parameter, Role::M, Role::V].map(|role| (slice.clone(), role)))
                .collect();
            for piece in self.checkpoint.read_slices(&wanted)? {
                let piece = piece?;
                session.shell.command(Command::State {
                    rank: group.owner,
                    slice: piece.slice,
                    role: piece.role,
                    bytes: piece.bytes,
                })?;
            }
        }
        Ok(())
    }
}
