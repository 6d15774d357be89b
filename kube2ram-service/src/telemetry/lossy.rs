//! Log lines on their way to standard error: a bounded buffer, and a thread that writes it. A thread that
//! logs never waits for the reader.
//!
//! containerd's shim reads standard error through a pipe of 64 KiB. When it stops reading (containerd is
//! stopped, the disk is slow), a write blocks; in a runtime thread, that would be a request which is not
//! answered. Depends on nothing; called by `telemetry`.

use std::{
    io::{self, Write},
    mem::{replace, take},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prometheus_client::metrics::counter::Counter;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Accepts log lines, and drops those for which there is no room. Clones share the buffer.
#[derive(Clone, Debug)]
pub struct LossyWriter(Arc<Shared>);

/// How many bytes may wait.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Lines of all levels.
    pub lines_bytes: usize,
    /// Additional room for errors: other lines must not take the room of the one with the reason why the
    /// agent ends.
    pub errors_bytes: usize,
}

impl Default for Room {
    /// About a thousand lines of the access log.
    fn default() -> Self {
        Self { lines_bytes: 256 * 1024, errors_bytes: 64 * 1024 }
    }
}

#[derive(Debug)]
struct Shared {
    room: Room,
    queue: Mutex<Queue>,
    filled: Condvar,
    drained: Condvar,
    lost: Counter,
}

#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    /// Whether the thread is writing lines that it has removed from the buffer.
    is_writing: bool,
    /// Since the thread last reported it.
    lost: u64,
}

/// One line.
#[derive(Debug)]
pub struct Line<'a> {
    shared: &'a Shared,
    limit_bytes: usize,
}

impl LossyWriter {
    /// Starts the thread. It calls `report` with the number of lines that were lost once it can write again.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(output: impl Write + Send + 'static, room: Room, report: fn(u64)) -> io::Result<Self> {
        let (queue, filled, drained) = (Mutex::default(), Condvar::new(), Condvar::new());
        let shared = Arc::new(Shared { room, queue, filled, drained, lost: Counter::default() });
        let writer = Self(Arc::clone(&shared));
        thread::Builder::new().name("log-writer".into()).spawn(move || shared.write_to(output, report))?;
        Ok(writer)
    }

    /// Counts the lines that were lost.
    pub fn lost(&self) -> Counter {
        self.0.lost.clone()
    }

    /// Waits until all lines are written, for at most `limit`, because the reader may have stopped. Returns
    /// whether they are.
    pub fn flush(&self, limit: Duration) -> bool {
        let is_busy = |queue: &mut Queue| queue.is_writing || !queue.bytes.is_empty();
        let waited = self.0.drained.wait_timeout_while(self.0.queue(), limit, is_busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

impl<'a> MakeWriter<'a> for LossyWriter {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { shared: &self.0, limit_bytes: self.0.room.lines_bytes }
    }

    fn make_writer_for(&'a self, metadata: &Metadata<'_>) -> Line<'a> {
        let Room { lines_bytes, errors_bytes } = self.0.room;
        let reserve = if *metadata.level() == Level::ERROR { errors_bytes } else { 0 };
        Line { shared: &self.0, limit_bytes: lines_bytes + reserve }
    }
}

/// tracing-subscriber writes each line by one call.
impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.shared.push(line, self.limit_bytes);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn push(&self, line: &[u8], limit_bytes: usize) {
        let mut queue = self.queue();
        if queue.bytes.len() + line.len() > limit_bytes {
            queue.lost += 1;
            self.lost.inc();
            return;
        }
        queue.bytes.extend_from_slice(line);
        // A writing thread checks again before it waits.
        if !queue.is_writing {
            self.filled.notify_one();
        }
    }

    fn write_to(&self, mut output: impl Write, report: fn(u64)) {
        let mut batch = Vec::new();
        loop {
            let mut queue = self.queue();
            queue.is_writing = false;
            if queue.bytes.is_empty() {
                self.drained.notify_all();
                let is_empty = |queue: &mut Queue| queue.bytes.is_empty();
                queue = self.filled.wait_while(queue, is_empty).unwrap_or_else(PoisonError::into_inner);
            }
            queue.is_writing = true;
            batch = replace(&mut queue.bytes, batch);
            drop(queue);
            let lost = match output.write_all(&batch) {
                Ok(()) => take(&mut self.queue().lost),
                // The reader has ended. Only the metric can report that.
                Err(_) => {
                    self.lost.inc_by(batch.iter().filter(|byte| **byte == b'\n').count() as u64);
                    0
                }
            };
            batch.clear();
            batch.shrink_to(KEPT_BYTES);
            if lost > 0 {
                report(lost);
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that is kept for the next lines; more is given back.
const KEPT_BYTES: usize = 16 * 1024;

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Read as _, pipe},
        sync::{
            atomic::{AtomicU64, Ordering},
            mpsc::{SyncSender, sync_channel},
        },
        time::Instant,
    };

    use super::*;

    const ROOM: Room = Room { lines_bytes: 4096, errors_bytes: 100 };
    const PATIENCE: Duration = Duration::from_secs(20);

    fn line(number: usize) -> String {
        format!("{number:099}\n")
    }

    /// Writes until the pipe takes no more, and 100 lines beyond: gives the number of all.
    fn overfill(writer: &LossyWriter) -> usize {
        let mut written = 0;
        let mut write = || {
            writer.make_writer().write_all(line(written).as_bytes()).unwrap();
            written += 1;
        };
        while writer.flush(Duration::from_millis(100)) {
            write();
        }
        (0..100).for_each(|_| write());
        written
    }

    #[test]
    fn lines_that_nobody_reads_are_lost_and_counted_and_later_ones_flow_again() {
        static REPORTED: AtomicU64 = AtomicU64::new(0);
        let (reader, output) = pipe().unwrap();
        let writer = LossyWriter::start(output, ROOM, |lost| {
            REPORTED.fetch_add(lost, Ordering::Relaxed);
        })
        .unwrap();

        let started = Instant::now();
        let written = overfill(&writer);
        let lost = writer.lost().get();

        assert!(started.elapsed() < PATIENCE, "the writer waited for the reader");
        assert_eq!(lost, 60, "40 lines have room");
        assert_eq!(REPORTED.load(Ordering::Relaxed), 0, "nothing can be reported yet");

        let mut lines = BufReader::new(reader).lines();
        let kept: Vec<_> = lines.by_ref().take(written - usize::try_from(lost).unwrap()).collect();
        assert!(writer.flush(PATIENCE));
        writer.make_writer().write_all(b"again\n").unwrap();

        assert!(kept.iter().all(|line| line.as_ref().is_ok_and(|line| line.len() == 99)), "only whole lines");
        assert_eq!(lines.next().unwrap().unwrap(), "again");
        assert_eq!((writer.lost().get(), REPORTED.load(Ordering::Relaxed)), (lost, lost));
    }

    /// Waits with each line until somebody takes it.
    struct OneByOne(SyncSender<Vec<u8>>);

    impl Write for OneByOne {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let line = bytes.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
            self.0.send(line.to_vec()).map_err(io::Error::other)?;
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn each_line_is_delivered_or_counted_while_the_reader_is_slower_than_the_log() {
        static REPORTED: AtomicU64 = AtomicU64::new(0);
        let (output, reader) = sync_channel(0);
        let writer = LossyWriter::start(OneByOne(output), ROOM, |lost| {
            REPORTED.fetch_add(lost, Ordering::Relaxed);
        })
        .unwrap();
        let (mut written, mut delivered) = (0, Vec::new());

        // Ten lines for each one that is read: the writer holds 80 of these 200 at most.
        for _ in 0..20 {
            for _ in 0..10 {
                writer.make_writer().write_all(line(written).as_bytes()).unwrap();
                written += 1;
            }
            delivered.push(reader.recv_timeout(PATIENCE).unwrap());
        }
        let lost = writer.lost().get();
        // A line that nobody takes keeps the writer busy.
        while !writer.flush(Duration::ZERO) {
            delivered.extend(reader.recv_timeout(Duration::from_millis(10)));
        }

        assert!(lost >= 100, "{lost}");
        assert_eq!(delivered.len() + usize::try_from(lost).unwrap(), written);
        assert_eq!((writer.lost().get(), REPORTED.load(Ordering::Relaxed)), (lost, lost));
        let numbers = delivered.iter().map(|line| str::from_utf8(line).unwrap().trim().parse::<usize>());
        let numbers: Vec<_> = numbers.map(Result::unwrap).collect();
        assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
        assert!(delivered.iter().all(|line| line.len() == 100), "only whole lines");
    }

    #[test]
    fn the_last_error_has_room_when_other_lines_have_used_theirs() {
        let (mut reader, output) = pipe().unwrap();
        let writer = LossyWriter::start(output, ROOM, |_| {}).unwrap();
        overfill(&writer);
        let lost = writer.lost().get();

        let subscriber = tracing_subscriber::fmt().without_time().with_writer(writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!("a warning, which is lost");
            tracing::error!("the end");
        });

        assert_eq!(writer.lost().get(), lost + 1);
        let reading = thread::spawn(move || {
            let mut all = String::new();
            let mut buffer = [0; 4096];
            while !all.contains("the end") {
                let read = reader.read(&mut buffer).unwrap();
                assert!(read > 0, "{all}");
                all.push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
            all
        });
        assert!(writer.flush(PATIENCE));
        assert!(!reading.join().unwrap().contains("a warning"));
    }

    #[test]
    fn a_flush_ends_although_nobody_reads() {
        let (_reader, output) = pipe().unwrap();
        let writer = LossyWriter::start(output, Room::default(), |_| {}).unwrap();
        writer.make_writer().write_all(&[b'x'; 100 * 1024]).unwrap();
        let started = Instant::now();

        assert!(!writer.flush(Duration::from_millis(100)));

        assert!((Duration::from_millis(100)..PATIENCE).contains(&started.elapsed()));
    }

    #[test]
    fn lines_are_counted_as_lost_when_the_reader_has_ended() {
        let (reader, output) = pipe().unwrap();
        drop(reader);
        let writer = LossyWriter::start(output, ROOM, |_| {}).unwrap();

        writer.make_writer().write_all(b"one\ntwo\n").unwrap();
        assert!(writer.flush(PATIENCE));

        assert_eq!(writer.lost().get(), 2);
    }
}
