"""Two real processes, joined by gloo, that run what a test gives them."""

import multiprocessing
import os
import pickle
import traceback
from datetime import timedelta
from functools import partial

import torch.distributed as dist

PATIENCE = 60  # seconds until a process that waits for the other gives up


class Two:
    """Two processes that live for the whole session, since starting them is what takes time."""

    def __init__(self, folder):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pruneflow", "torch._dynamo"])  # imported once for both
        self.connections, self.processes = [], []
        for rank in range(2):
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, folder, theirs), daemon=True)
            process.start()
            self.connections.append(connection)
            self.processes.append(process)

    def __call__(self, function, *arguments, **keywords):
        """Run a function in both; return what it returned in rank 0 and in rank 1."""
        task = pickle.dumps(partial(function, *arguments, **keywords))
        for connection in self.connections:
            connection.send_bytes(task)
        outcomes = []
        for rank, connection in enumerate(self.connections):
            assert connection.poll(2 * PATIENCE), f"rank {rank} hangs"
            outcomes.append(pickle.loads(connection.recv_bytes()))
        errors = [f"in rank {rank}:\n{error}" for rank, (_, error) in enumerate(outcomes) if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in outcomes]

    def close(self):
        for connection in self.connections:
            connection.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(PATIENCE)
            process.kill()


def _serve(rank, folder, connection):
    # What torchrun tells its processes. Lightning goes by it, and finds the group made already.
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ |= dict(zip(names, map(str, (rank, rank, 0, 2, 2)), strict=True))
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
    while (task := pickle.loads(connection.recv_bytes())) is not None:
        try:
            outcome = task(), None
        except Exception:
            outcome = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(outcome))
    dist.destroy_process_group()
