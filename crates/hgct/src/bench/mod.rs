//! `hgct bench`: every figure that hgct claims, as a command.

mod candidates;
mod credit;
mod figures;
mod memory;
mod training;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::workspace::Workspace;

/// `hgct bench`
#[derive(Debug, Args)]
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
    /// Use processor time at a rate
    #[command(hide = true)]
    Spend(credit::SpendArgs),
}

pub(crate) fn run(workspace: &Workspace, args: &BenchArgs) -> Result<u8> {
    match &args.command {
        BenchCommand::Training(args) => training::run(workspace, args),
        BenchCommand::Memory(args) => memory::run(workspace, args),
        BenchCommand::Spend(args) => credit::spend(args),
    }
}
