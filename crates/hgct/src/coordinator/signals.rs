//! Ctrl-C and SIGTERM: the first stops after the current step, the second at once.

use anyhow::{Context as _, Result};
use hgct_control::coordinator::Command;

use super::urgent::{Gone, Urgent};

/// Keeps SIGINT and SIGTERM from ending this process; call it before any thread starts. Children
/// are not affected: the standard library empties the mask of what it spawns.
pub(crate) fn block_signals() -> Result<()> {
    let set = signal_set();
    // SAFETY: the set is initialised, and no old mask is asked for.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if failed == 0 {
        Ok(())
    } else {
        Err(std::io::Error::from_raw_os_error(failed)).context("cannot block signals")
    }
}

/// Turns each signal into a stop.
pub(super) fn forward(urgent: Urgent) -> Result<()> {
    let wait = move || {
        let set = signal_set();
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are to live locals of this frame.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 {
                return;
            }
            eprintln!("hgct: stopping after this step; once more stops at once");
            if let Err(Gone) = urgent.give(Command::Stop) {
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

/// Waits for the next of the signals that [`block_signals`] blocks.
pub(crate) fn next_signal() -> Result<i32> {
    let set = signal_set();
    let mut signal = 0;
    // SAFETY: both pointers are to live locals of this frame.
    match unsafe { libc::sigwait(&raw const set, &raw mut signal) } {
        0 => Ok(signal),
        failed => Err(std::io::Error::from_raw_os_error(failed)).context("cannot wait for signals"),
    }
}

fn signal_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set that the others then change; the numbers are valid.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        set.assume_init()
    }
}
