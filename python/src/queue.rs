//! The class `Queue`: the requests of an event loop to an image.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use qcow_recycler::buf::Held;
use qcow_recycler::queue::{self, Completion, QueueOptions, Request};

use crate::buffer::{self, Memory};
use crate::device::Device;
use crate::image::Image;

/// The most requests that are under way at once; others wait here.
const DEPTH: u32 = 256;

/// Requests that go on by themselves. An event loop calls reap() when the descriptor is readable, and the futures that the
/// requests were given have their results. All but finish() is for the loop's own thread, and returns at once.
#[pyclass(frozen, module = "qcow_recycler._ext")]
pub(crate) struct Queue {
    image: Py<Image>,
    descriptor: RawFd,
    /// Until `finish`.
    queue: Mutex<Option<Arc<queue::Queue<Device>>>>,
    /// Never locked while anything is waited for.
    asked: Mutex<Asked>,
}

#[derive(Default)]
struct Asked {
    /// Of what has not ended; it keeps the memory of the requests.
    promises: HashMap<u64, Promise>,
    last: u64,
    /// What the queue had no room for yet.
    waiting: VecDeque<(u64, Request)>,
    /// Ended, and no future knows yet.
    ended: Vec<Completion>,
}

struct Promise {
    future: Py<PyAny>,
    answer: Answer,
}

/// What a request is to return.
enum Answer {
    Nothing,
    /// The bytes that were read.
    Bytes(Py<PyBytes>),
    /// The length of the buffer.
    Length(PyUntypedBuffer),
}

impl Queue {
    /// # Errors
    /// `Closed` in a child of the process that opened the image, as all calls but `finish`.
    fn ask(&self, py: Python<'_>, future: Py<PyAny>, request: Request, answer: Answer) -> PyResult<()> {
        self.image.get().ensure_own(py)?;
        {
            let mut asked = self.asked.lock();
            asked.last += 1;
            let number = asked.last;
            asked.promises.insert(number, Promise { future, answer });
            asked.waiting.push_back((number, request));
        }
        let queue = self.queue.lock().clone();
        if let Some(queue) = queue {
            // The last user of a queue waits for its threads, which may wait for the interpreter's lock.
            py.detach(move || {
                self.submit(&queue);
                drop(queue);
            });
        }
        Ok(())
    }

    /// Submits what there is room for.
    fn submit(&self, queue: &queue::Queue<Device>) {
        while queue.pending() < DEPTH as usize {
            let Some((number, request)) = self.asked.lock().waiting.pop_front() else { return };
            // There is room: nobody else submits.
            let _ = queue.submit(request, number);
        }
    }

    /// Gives the futures of what has ended their results.
    fn tell(&self, py: Python<'_>) {
        let ended = std::mem::take(&mut self.asked.lock().ended);
        for completion in ended {
            let promise = self.asked.lock().promises.remove(&completion.user_data);
            let told = promise.map_or(Ok(()), |promise| self.keep(py, promise, completion));
            if let Err(raised) = told {
                raised.write_unraisable(py, None);
            }
        }
    }

    fn keep(&self, py: Python<'_>, promise: Promise, completion: Completion) -> PyResult<()> {
        let future = promise.future.bind(py);
        // A cancelled task does not wait any more.
        if future.call_method0(intern!(py, "done"))?.is_truthy()? {
            return Ok(());
        }
        let set_result = intern!(py, "set_result");
        match (completion.result, promise.answer) {
            (Err(e), _) => {
                let exception = self.image.get().raise(py, e).into_value(py);
                future.call_method1(intern!(py, "set_exception"), (exception,))
            }
            (Ok(()), Answer::Nothing) => future.call_method1(set_result, (py.None(),)),
            (Ok(()), Answer::Bytes(bytes)) => future.call_method1(set_result, (bytes,)),
            (Ok(()), Answer::Length(held)) => future.call_method1(set_result, (held.len_bytes(),)),
        }
        .map(drop)
    }

    /// The memory of a Python object for a request, and what keeps it.
    fn hold(memory: Memory) -> (Held, Answer) {
        // SAFETY: the answer keeps the memory, and is itself kept among the promises until the request has ended.
        let held = unsafe { Held::new(&[memory.area()]) };
        (held, Answer::Length(memory.into_held()))
    }
}

#[pymethods]
impl Queue {
    #[new]
    fn new(py: Python<'_>, image: Py<Image>) -> PyResult<Self> {
        let make = |disk: &qcow_recycler::Disk<Device>| {
            let options = QueueOptions { depth: DEPTH, ..QueueOptions::default() };
            let queue = queue::Queue::new(disk.image().clone(), options)?;
            queue.arm()?;
            let descriptor = queue.event()?.as_raw_fd();
            Ok((Arc::new(queue), descriptor))
        };
        let (queue, descriptor) = image.get().call(py, make)?;
        Ok(Queue { image, descriptor, queue: Mutex::new(Some(queue)), asked: Mutex::default() })
    }

    /// Readable when reap() is to be called; valid until finish().
    fn fileno(&self, py: Python<'_>) -> PyResult<RawFd> {
        self.image.get().ensure_own(py)?;
        Ok(self.descriptor)
    }

    /// `future` becomes `length` bytes from `offset`.
    fn read(&self, py: Python<'_>, future: Py<PyAny>, offset: u64, length: usize) -> PyResult<()> {
        self.image.get().check_length(py, offset, length)?;
        let (bytes, area) = buffer::new_bytes(py, length)?;
        // SAFETY: the promise keeps the bytes, which nobody else has, until the request has ended.
        let memory = unsafe { Held::new(&[area]) };
        self.ask(py, future, Request::Read { offset, memory }, Answer::Bytes(bytes))
    }

    /// Fills a writable buffer from `offset`; `future` becomes its length.
    fn readinto(&self, py: Python<'_>, future: Py<PyAny>, offset: u64, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
        let (memory, answer) = Queue::hold(Memory::writable(buffer)?);
        self.ask(py, future, Request::Read { offset, memory }, answer)
    }

    /// Stores a buffer at `offset`; `future` becomes its length.
    fn write(&self, py: Python<'_>, future: Py<PyAny>, offset: u64, buffer: &Bound<'_, PyAny>) -> PyResult<()> {
        let (memory, answer) = Queue::hold(Memory::readable(buffer)?);
        self.ask(py, future, Request::Write { offset, memory }, answer)
    }

    /// Frees a range.
    fn discard(&self, py: Python<'_>, future: Py<PyAny>, offset: u64, length: u64) -> PyResult<()> {
        self.ask(py, future, Request::Discard { offset, length }, Answer::Nothing)
    }

    /// Makes a range read as zeroes.
    fn write_zeroes(
        &self,
        py: Python<'_>,
        future: Py<PyAny>,
        offset: u64,
        length: u64,
        may_unmap: bool,
    ) -> PyResult<()> {
        self.ask(py, future, Request::WriteZeroes { offset, length, may_unmap }, Answer::Nothing)
    }

    /// Makes durable what has completed.
    fn flush(&self, py: Python<'_>, future: Py<PyAny>) -> PyResult<()> {
        self.ask(py, future, Request::Flush, Answer::Nothing)
    }

    /// Gives the futures of what has ended their results, and has the descriptor become readable when more ends.
    fn reap(&self, py: Python<'_>) -> PyResult<()> {
        self.image.get().ensure_own(py)?;
        loop {
            let queue = self.queue.lock().clone();
            let armed = queue.map(|queue| {
                py.detach(move || {
                    let mut ended = Vec::new();
                    queue.reap(0, usize::MAX, Some(Duration::ZERO), |completion| ended.push(completion));
                    self.asked.lock().ended.append(&mut ended);
                    self.submit(&queue);
                    let armed = queue.arm();
                    drop(queue);
                    armed
                })
            });
            self.tell(py);
            match armed {
                Some(Err(e)) => return Err(self.image.get().raise(py, e)),
                Some(Ok(1..)) => {}
                None | Some(Ok(0)) => return Ok(()),
            }
        }
    }

    /// Waits until everything has ended, on another thread than the loop's, and lets the image go. The loop does not watch
    /// the descriptor any more; its last reap() gives the last results. Does nothing in a child of the process that opened the
    /// image.
    fn finish(&self, py: Python<'_>) {
        if self.image.get().is_inherited() {
            return;
        }
        let Some(queue) = self.queue.lock().take() else { return };
        py.detach(move || {
            let mut ended = Vec::new();
            while queue.reap(usize::MAX, usize::MAX, None, |completion| ended.push(completion)) > 0 {
                self.submit(&queue);
            }
            self.asked.lock().ended.append(&mut ended);
            drop(queue);
        });
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if self.image.get().is_inherited() {
            // The memory of the kernel's ring is not there. A thread that is not there either may have been changing the rest.
            std::mem::forget((self.queue.get_mut().take(), std::mem::take(self.asked.get_mut())));
            return;
        }
        // Before the memory of requests: this waits for them, and for threads that may want the interpreter's lock.
        let queue = self.queue.get_mut().take();
        Python::try_attach(|py| py.detach(move || drop(queue)));
    }
}
