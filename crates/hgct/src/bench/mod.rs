//! `hgct bench`: every figure that hgct claims, as a command.

mod candidates;
mod credit;
mod figures;
mod memory;
mod training;
mod worker;

use std::fmt::Display;
use std::path::Path;

use anyhow::Result;
use clap::{Args, Subcommand};
use hgct_core::canonical;
use serde::Serialize;

use crate::output::print;
use crate::workspace::{Workspace, write_atomically};

/// `hgct bench`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  hgct bench training --rounds 5\n  hgct bench memory job.toml")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// How much of the kinds' summed speed one job over all of them reaches
    Training(training::TrainingArgs),
    /// What workers hold in memory, against predictions and plain loops of the same frameworks
    Memory(memory::MemoryArgs),
    /// How fast the worker without Python trains, against a plain Burn loop
    Worker(worker::WorkerArgs),
    /// Use processor time at a rate
    #[command(hide = true)]
    Spend(credit::SpendArgs),
}

pub(crate) fn run(workspace: &Workspace, args: &BenchArgs) -> Result<u8> {
    match &args.command {
        BenchCommand::Training(args) => training::run(workspace, args),
        BenchCommand::Memory(args) => memory::run(workspace, args),
        BenchCommand::Worker(args) => worker::run(workspace, args),
        BenchCommand::Spend(args) => credit::spend(args),
    }
}

/// Keeps a result as `NAME.json` and `NAME.txt` in a folder, if one is given, and prints it.
fn deliver<B: Serialize + Display>(bench: &B, name: &str, folder: Option<&Path>, json: bool) -> Result<()> {
    let (object, text) = (canonical::encode(bench), format!("{bench}\n"));
    if let Some(folder) = folder {
        write_atomically(&folder.join(format!("{name}.json")), object.as_bytes(), 0o644)?;
        write_atomically(&folder.join(format!("{name}.txt")), text.as_bytes(), 0o644)?;
    }
    let printed = if json { object } else { text };
    print(&printed)
}
