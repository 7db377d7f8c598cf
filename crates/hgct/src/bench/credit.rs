//! A wait earns no credit.
//!
//! A quota is refilled every period whether its group computes or waits, so a worker that has just
//! waited starts with more than its rate: an accelerator, for which the quota stands, would not. In
//! each worker's group a process of idle priority therefore uses the quota at its rate while the
//! worker waits, and steps aside at once when it computes.

use std::io::Read as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use hgct_core::cluster::ClusterSpec;

use crate::grants;

/// So much of the rate is used at a time: short against a period.
const SLICE: Duration = Duration::from_millis(1);

/// `hgct bench spend`, started by [`Spenders`]
#[derive(Debug, Args)]
pub(crate) struct SpendArgs {
    /// Thousandths of a core
    #[arg(long)]
    millicores: u32,
}

/// Uses processor time at a rate until standard input ends.
pub(crate) fn spend(args: &SpendArgs) -> Result<u8> {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let share = SLICE * args.millicores / 1000;
    loop {
        let (began, used) = (Instant::now(), own_time());
        // Who is kept from running makes up for nothing.
        while own_time().saturating_sub(used) < share && began.elapsed() < SLICE {
            std::hint::spin_loop();
        }
        std::thread::sleep(SLICE.saturating_sub(began.elapsed()));
    }
}

fn own_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// One process in the group of each device's worker; they end when this is dropped.
pub(super) struct Spenders {
    children: Vec<(Child, Option<ChildStdin>)>,
}

impl Spenders {
    /// Starts them in the groups that the agents of this process made.
    pub(super) fn start(cluster: &ClusterSpec) -> Result<Self> {
        let mut this = Self { children: Vec::new() };
        for (_, device) in cluster.devices() {
            let mut command = Command::new("chrt");
            command.args(["--idle", "0"]).arg(std::env::current_exe()?);
            command.args(["bench", "spend", "--millicores", &device.grant.cpu_millicores.to_string()]);
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .context("cannot start `chrt` (on Debian: apt-get install util-linux)")?;
            let (input, id) = (child.stdin.take(), child.id());
            this.children.push((child, input));
            if grants::join_groups_of_agents(device.id.as_str(), id)? == 0 {
                bail!("no control group of {} was found", device.id);
            }
            grants::pin(id, &device.grant.cores)?;
        }
        Ok(this)
    }
}

impl Drop for Spenders {
    fn drop(&mut self) {
        for (child, input) in &mut self.children {
            // The end of its input ends it; should it not, the kill does.
            drop(input.take());
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
