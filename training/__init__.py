"""Offline training: teacher, Jacobi trajectories, consistency distillation."""

if __name__ == "training":  # the name of earlier versions
    from ceed_vla.former_names import redirect

    redirect(__name__)
