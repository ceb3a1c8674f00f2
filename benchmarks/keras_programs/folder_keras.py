"""Trains the documented CNN on a folder of images with Keras, and prints the test accuracy."""

import keras
from keras import layers

options = {"image_size": (28, 28), "color_mode": "grayscale"}
split = {"validation_split": 0.1, "subset": "both", "seed": 0}
train, validation = keras.utils.image_dataset_from_directory("digits", **options, **split)
test = keras.utils.image_dataset_from_directory("more_digits", **options)
model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        layers.Rescaling(1 / 255),
        layers.Conv2D(32, (3, 3), activation="relu"),
        layers.MaxPooling2D((2, 2)),
        layers.Conv2D(64, (3, 3), activation="relu"),
        layers.MaxPooling2D((2, 2)),
        layers.Conv2D(64, (3, 3), activation="relu"),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(train, epochs=5, validation_data=validation)
print(model.evaluate(test)[1])
