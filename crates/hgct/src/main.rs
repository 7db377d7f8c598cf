//! The hgct command.

/// A line on standard error, in place of the standard macro of this name, which panics where nobody
/// reads any more: a message that is lost is no reason to end a run.
macro_rules! eprintln {
    ($($text:tt)*) => {
        drop(std::io::Write::write_fmt(
            &mut std::io::stderr().lock(),
            format_args!("{}\n", format_args!($($text)*)),
        ))
    };
}

mod agent;
mod bench;
mod catalogue;
mod ckpt;
mod commands;
mod coordinator;
mod date;
mod devices;
mod display;
mod environments;
mod grants;
mod job;
mod layouts;
mod metrics;
mod output;
mod plain_loops;
mod planning;
mod process;
mod report;
mod session;
mod stages;
mod train;
mod validate;
mod vendors;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hgct_control::coordinator::Outcome;

/// Trains one model on devices of several vendors and frameworks at once.
#[derive(Debug, Parser)]
#[command(
    name = "hgct",
    version,
    propagate_version = true,
    after_help = "Exit codes: 0 done; 1 a run or a device failed; 2 bad input; 130 stopped at once."
)]
struct Cli {
    /// Folder of environments, caches and runs
    #[arg(long, global = true, value_name = "DIR", default_value = ".hgct")]
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show which devices this host offers, and why others cannot be used
    Devices(devices::Args),
    /// Run the conformance suite on devices
    Check(commands::CheckArgs),
    /// Measure the devices for a job
    #[command(after_help = "Example:\n  hgct profile job.toml --output profile.json")]
    Profile(commands::PlanArgs),
    /// Plan a job under what was measured, or any model on any cluster, and say why this plan
    Plan(Box<planning::Args>),
    /// Train a job: discover, check, profile, plan, train, report
    Train(train::TrainArgs),
    /// Serve a run on this host: start and watch its workers
    Agent(agent::AgentArgs),
    /// Write and show the report of a run
    Report(report::Args),
    /// Measure what hgct claims
    Bench(bench::BenchArgs),
    /// Inspect or export checkpoints
    Ckpt(ckpt::CkptArgs),
    /// Simulate a step of a plan: its time, its timeline, and what if
    Simulate(layouts::SimulateArgs),
    /// Write a plan in the words of another program
    Export(layouts::ExportArgs),
    /// Price plans that were really run, and show predicted beside measured
    Validate(validate::Args),
    /// Turn a job's text into token files
    Data(job::DataArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Who serves a run stops in order; all else may simply be ended.
    let serves = match &cli.command {
        Command::Devices(_)
        | Command::Report(_)
        | Command::Ckpt(_)
        | Command::Data(_)
        | Command::Simulate(_)
        | Command::Export(_)
        | Command::Validate(_)
        // Serves from when it has joined.
        | Command::Agent(_) => false,
        Command::Plan(args) => !args.only_documents(),
        _ => true,
    };
    let blocked = if serves { coordinator::block_signals() } else { Ok(()) };
    let done = blocked.and_then(|()| run(&cli));
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("hgct: {error:#}");
            ExitCode::from(code_of(&error))
        }
    }
}

/// A run that began and failed is no bad input.
fn code_of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<coordinator::Ended>() {
        Some(coordinator::Ended(Outcome::Aborted { .. } | Outcome::Stopped { step: None })) => 130,
        Some(_) => 1,
        None => 2,
    }
}

fn run(cli: &Cli) -> anyhow::Result<u8> {
    match &cli.command {
        Command::Devices(args) => devices::run(&cli.dir, args),
        Command::Check(args) => commands::check(&workspace::Workspace::open(&cli.dir)?, args),
        Command::Profile(args) => commands::profile(&workspace::Workspace::open(&cli.dir)?, args),
        Command::Plan(args) => planning::run(&cli.dir, args),
        Command::Train(args) => train::run(&workspace::Workspace::open(&cli.dir)?, args),
        Command::Agent(args) => agent::run(&cli.dir, args),
        Command::Report(args) => report::run(&workspace::Workspace::open(&cli.dir)?, args),
        Command::Bench(args) => bench::run(&workspace::Workspace::open(&cli.dir)?, args),
        Command::Ckpt(args) => ckpt::run(&workspace::Workspace::open(&cli.dir)?, args),
        Command::Simulate(args) => layouts::simulate(args),
        Command::Export(args) => layouts::export_plan(args),
        Command::Validate(args) => validate::run(args),
        Command::Data(args) => job::prepare_data(&workspace::Workspace::open(&cli.dir)?, args),
    }
}
