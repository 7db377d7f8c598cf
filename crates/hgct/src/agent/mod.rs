//! The agent: the one long-lived process of a node, which starts and watches its workers.
//!
//! A thin shell of threads and one inbox around the machine of `hgct_control`. One thread owns the
//! machine, starts the workers (the kernel kills them when it ends) and never waits for anything
//! but its inbox:
//!
//! ```text
//! coordinator ─► link reader ─┐                    ┌─► link writer ─► coordinator
//! worker pipe ─► its reader  ─┤                    ├─► its writer  ─► worker pipe
//! worker exit ─► its waiter  ─┼─► inbox ─► machine ┼─► content store
//! content store, discovery,  ─┤                    ├─► processes, signals
//! signals                    ─┘                    └─► control groups
//! ```
//!
//! Readers wait for room before they fill the inbox, so memory stays bounded whoever is slow.

mod blobs;
mod budget;
mod link;
mod shell;
mod token;
mod worker;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hgct_comm::monotonic_ns;
use hgct_control::agent::{Agent, Config};
use hgct_control::auth::Key;
use hgct_control::message::{Envelope, Exit, FromWorker, ToAgent};
use hgct_core::ids::{DeviceId, NodeId};

pub(crate) use token::read_token;

use crate::devices::{self, Discovery};
use shell::Shell;

/// Options of `hgct agent`.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Example, on another host with the same token file:\n  hgct agent --join 10.0.0.1:7070 \
    --token-file token --listen 10.0.0.2\n\nExit code: 0 when the run ended in order, 1 when the coordinator \
    or this agent was lost, 2 for a bad call, token file or handshake."
)]
pub(crate) struct AgentArgs {
    /// Where the coordinator listens
    #[arg(long, value_name = "HOST:PORT")]
    join: String,
    /// File with the run's token, mode 0600
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// This node's name [default: the host's]
    #[arg(long)]
    name: Option<NodeId>,
    /// Address on which this node's workers take data connections
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    listen: IpAddr,
    /// Address that other nodes use instead of the one listened on
    #[arg(long, value_name = "IP")]
    advertise: Option<IpAddr>,
    /// A folder of vendor files over the built-in ones
    #[arg(long, value_name = "DIR")]
    vendors: Option<PathBuf>,
    /// Seconds to wait for the coordinator
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = crate::session::seconds())]
    wait: u64,
}

/// Serves one run with the environments of `folder` (`.hgct`); the exit code.
pub(crate) fn run(folder: &Path, args: &AgentArgs) -> Result<u8> {
    let token = read_token(&args.token_file)?;
    let node = match &args.name {
        Some(name) => name.clone(),
        None => host_name()?,
    };
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the folder {}", folder.display()))?;
    // Workers run elsewhere: every path that they hear is absolute.
    let folder = folder.canonicalize().with_context(|| format!("cannot find {}", folder.display()))?;
    // Until it has joined, a signal simply ends it; no thread runs yet that would not block them.
    let joined = link::join(&args.join, &token, &node, Duration::from_secs(args.wait))?;
    crate::coordinator::block_signals()?;
    let (here, there) = (joined.stream.local_addr()?.ip(), joined.stream.peer_addr()?.ip());
    let run = joined.peer.run.clone();
    eprintln!("hgct agent: joined run {run} at {} as node {node}", args.join);
    if args.listen.is_loopback() && !there.is_loopback() {
        eprintln!(
            "hgct agent: workers of other nodes cannot reach this one: to let them, use --listen {here}"
        );
    }
    // One who listens everywhere is reached where the coordinator sees it.
    let everywhere = args.listen.is_unspecified().then_some(here);
    let config = Config {
        run: run.clone(),
        node: node.clone(),
        pid: std::process::id(),
        memory_bytes: shell::resident_bytes(),
        data_key: Key::data(&token, &run),
        blobs: folder.join("blobs").display().to_string(),
        listen: vec![SocketAddr::new(args.listen, 0)],
        advertise: args.advertise.or(everywhere).into_iter().collect(),
    };
    let mut options = devices::Options::new(node, &folder);
    options.vendors.clone_from(&args.vendors);
    let (wakes, inbox) = channel();
    forward_signals(wakes.clone())?;
    let logs = folder.join("agent-logs").join(run.as_str());
    let blobs = folder.join("blobs");
    let mut shell = Shell::new(wakes, joined.stream, options, &blobs, logs)?;
    let (reason, orderly) = shell.drive(Agent::new(config, monotonic_ns()), &inbox);
    eprintln!("hgct agent: {reason}");
    shell.close();
    Ok(u8::from(!orderly))
}

/// Everything that can wake the agent.
#[derive(Debug)]
enum Wake {
    /// The coordinator says.
    Order { envelope: Box<Envelope<ToAgent>>, payload: Vec<u8> },
    /// The connection is over.
    Lost { cause: String },
    /// A worker does not take its orders from the pipe.
    Stuck { worker: DeviceId },
    /// A worker says.
    Said { worker: DeviceId, incarnation: u64, envelope: Box<Envelope<FromWorker>>, payload: Vec<u8> },
    /// A worker's bytes are no messages.
    Broken { worker: DeviceId, incarnation: u64, error: String },
    /// A worker's process is gone.
    Exited { worker: DeviceId, incarnation: u64, exit: Exit },
    /// The node's devices are known, or why not.
    Discovered(Box<Result<Discovery, String>>),
    /// The content store answers.
    Blob(Result<blobs::State, String>),
    /// Ctrl-C or SIGTERM.
    Signal(i32),
}

fn host_name() -> Result<NodeId> {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    NodeId::new(name).context("the host's name does not serve: give one with --name")
}

/// SIGINT and SIGTERM, which all threads block, become wakes.
fn forward_signals(wakes: std::sync::mpsc::Sender<Wake>) -> Result<()> {
    let wait = move || {
        while let Ok(signal) = crate::coordinator::next_signal() {
            if wakes.send(Wake::Signal(signal)).is_err() {
                // The loop has ended and hangs in its farewell.
                std::process::exit(130);
            }
        }
    };
    std::thread::Builder::new()
        .name("hgct-signals".into())
        .spawn(wait)
        .map(drop)
        .context("cannot start a thread")
}
