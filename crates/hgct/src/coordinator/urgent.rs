//! Commands that the machine hears even while its driver is behind and it takes no events.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::time::Duration;

use hgct_control::coordinator::{Command, Event};

/// Gives commands that never wait for room: stops, and the end.
#[derive(Clone)]
pub(super) struct Urgent {
    commands: Sender<Command>,
    events: SyncSender<Event>,
}

/// What the machine's thread hears.
pub(super) struct Inbox {
    urgent: Receiver<Command>,
    events: Receiver<Event>,
}

/// The machine's thread has ended.
#[derive(Debug)]
pub(super) struct Gone;

/// Joins urgent commands to the channel of events.
pub(super) fn join(sender: &SyncSender<Event>, events: Receiver<Event>) -> (Urgent, Inbox) {
    let (commands, urgent) = channel();
    (Urgent { commands, events: sender.clone() }, Inbox { urgent, events })
}

impl Urgent {
    /// Gives a command; never waits.
    pub(super) fn give(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).map_err(|_| Gone)?;
        // Wakes a machine that waits for events; one with a full inbox does not.
        let _ = self.events.try_send(Event::Tick);
        Ok(())
    }
}

impl Inbox {
    /// The next event, an urgent command first; a tick after `wait`. While the driver is behind,
    /// all but urgent commands stay where they are.
    pub(super) fn next(&self, wait: Duration, is_behind: bool) -> Result<Event, Gone> {
        if let Ok(command) = self.urgent.try_recv() {
            return Ok(Event::Command { command: Box::new(command) });
        }
        if is_behind {
            std::thread::sleep(wait);
            return Ok(Event::Behind);
        }
        match self.events.recv_timeout(wait) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => Ok(Event::Tick),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn a_stop_is_heard_where_no_event_finds_room() {
        let (sender, events) = sync_channel(1);
        let (urgent, inbox) = join(&sender, events);
        sender.send(Event::Tick).unwrap();
        urgent.give(Command::Stop).unwrap();
        urgent.give(Command::End).unwrap();
        for expected in [Command::Stop, Command::End] {
            let event = inbox.next(Duration::ZERO, true).unwrap();
            assert_eq!(event, Event::Command { command: Box::new(expected) });
        }
        assert_eq!(inbox.next(Duration::ZERO, true).unwrap(), Event::Behind);
        assert_eq!(inbox.next(Duration::ZERO, false).unwrap(), Event::Tick);
        drop(inbox);
        assert!(urgent.give(Command::Stop).is_err());
    }

    #[test]
    fn a_stop_wakes_a_machine_that_waits() {
        let (sender, events) = sync_channel(1);
        let (urgent, inbox) = join(&sender, events);
        let machine = std::thread::spawn(move || {
            let mut event = Event::Tick;
            while event == Event::Tick {
                event = inbox.next(Duration::from_secs(600), false).unwrap();
            }
            event
        });
        urgent.give(Command::Stop).unwrap();
        assert_eq!(machine.join().unwrap(), Event::Command { command: Box::new(Command::Stop) });
    }
}
